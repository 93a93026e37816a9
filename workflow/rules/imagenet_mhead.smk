# ImageNet linear evaluation of feature1 … feature5 (multi-head).
rule imagenet_mhead:
    """The record of every model that runs imagenet_mhead."""
    input:
        records("imagenet_mhead"),


rule imagenet_mhead_record:
    """Five linear classifiers, trained together on feature1 … feature5 of the frozen backbone."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/imagenet.json",
    output:
        record=record("imagenet_mhead"),
        curve="<results>/{model}/imagenet_mhead.csv",
        picture=picture("imagenet_mhead"),
    log:
        "<results>/{model}/logs/imagenet_mhead.log",
    benchmark:
        "<results>/{model}/times/imagenet_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(node_gpus)
    resources:
        gpu=node_gpus,
        mem_mb=megabytes(2_000, per_gpu=24_000, gpus=node_gpus),
        runtime=minutes(trained_on("imagenet_mhead"), per_second=1_000, gpus=node_gpus),
    params:
        config=benchmark_block("imagenet_mhead"),
        work=work_folder("imagenet_mhead"),
        python=launcher,
    shell:
        "{params.python} -m simclr imagenet_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
