# Places205 linear evaluation of feature1 … feature5.
rule places205_mhead:
    """The record of every model that runs places205_mhead."""
    input:
        records("places205_mhead"),


rule places205_mhead_record:
    """Five linear classifiers on Places205, as in imagenet_mhead."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/places205.json",
    output:
        "<results>/{model}/places205_mhead.json",
    log:
        "<results>/{model}/logs/places205_mhead.log",
    benchmark:
        "<results>/{model}/times/places205_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * gpu(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(images("places205", "train") * CONFIG.benchmarks.places205_mhead.epochs, per_second=1_000),
    params:
        config=benchmark_block("places205_mhead"),
        work=work_folder("places205_mhead"),
    shell:
        "python -m simclr places205_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
