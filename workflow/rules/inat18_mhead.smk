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
        record=record("inat18_mhead"),
        curve="<results>/{model}/inat18_mhead.csv",
        picture=picture("inat18_mhead"),
    log:
        "<results>/{model}/logs/inat18_mhead.log",
    benchmark:
        "<results>/{model}/times/inat18_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: lambda wildcards: 8 * node_gpus(wildcards) or 1
    resources:
        gpu=node_gpus,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * node_gpus(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(
            images("inat18", "train") * CONFIG.benchmarks.inat18_mhead.epochs,
            per_second=1_000 * max(1, node_gpus(wildcards)),
        ),
    params:
        config=benchmark_block("inat18_mhead"),
        work=work_folder("inat18_mhead"),
        python=launcher,
    shell:
        "{params.python} -m simclr inat18_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
