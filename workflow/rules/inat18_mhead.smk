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
    threads: cores(node_gpus)
    resources:
        gpu=node_gpus,
        mem_mb=megabytes(2_000, per_gpu=24_000, gpus=node_gpus),
        runtime=minutes(trained_on("inat18_mhead"), per_second=1_000, gpus=node_gpus),
    params:
        config=benchmark_block("inat18_mhead"),
        work=work_folder("inat18_mhead"),
        python=launcher,
    shell:
        "{params.python} -m simclr inat18_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
