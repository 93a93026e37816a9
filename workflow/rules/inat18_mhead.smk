# iNaturalist2018 linear evaluation of feature1 … feature5.
rule inat18_mhead:
    """The record of every model that runs inat18_mhead."""
    input:
        records("inat18_mhead"),


rule inat18_mhead_record:
    """Five linear classifiers on iNaturalist2018, as in imagenet_mhead."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/inat18.json",
    output:
        "<results>/{model}/inat18_mhead.json",
    log:
        "<results>/{model}/logs/inat18_mhead.log",
    benchmark:
        "<results>/{model}/times/inat18_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * gpu(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(images("inat18", "train") * CONFIG.benchmarks.inat18_mhead.epochs, per_second=1_000),
    params:
        config=benchmark_block("inat18_mhead"),
        work=work_folder("inat18_mhead"),
    shell:
        "python -m simclr inat18_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
