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
        record=record("places205_mhead"),
        curve="<results>/{model}/places205_mhead.csv",
        picture=picture("places205_mhead"),
    log:
        "<results>/{model}/logs/places205_mhead.log",
    benchmark:
        "<results>/{model}/times/places205_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(node_gpus)
    resources:
        gpu=node_gpus,
        mem_mb=megabytes(2_000, per_gpu=24_000, gpus=node_gpus),
        runtime=minutes(trained_on("places205_mhead"), per_second=1_000, gpus=node_gpus),
    params:
        config=benchmark_block("places205_mhead"),
        work=work_folder("places205_mhead"),
        python=launcher,
    shell:
        "{params.python} -m simclr places205_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
