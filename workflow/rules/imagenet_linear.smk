# ImageNet linear evaluation of AvgPool.
rule imagenet_linear:
    """The record of every model that runs imagenet_linear."""
    input:
        records("imagenet_linear"),


rule imagenet_linear_record:
    """One linear classifier on AvgPool of the frozen backbone."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/imagenet.json",
    output:
        record=record("imagenet_linear"),
        curve="<results>/{model}/imagenet_linear.csv",
        picture=picture("imagenet_linear"),
    log:
        "<results>/{model}/logs/imagenet_linear.log",
    benchmark:
        "<results>/{model}/times/imagenet_linear.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(node_gpus)
    resources:
        gpu=node_gpus,
        mem_mb=megabytes(2_000, per_gpu=24_000, gpus=node_gpus),
        runtime=minutes(trained_on("imagenet_linear"), per_second=1_000, gpus=node_gpus),
    params:
        config=benchmark_block("imagenet_linear"),
        work=work_folder("imagenet_linear"),
        python=launcher,
    shell:
        "{params.python} -m simclr imagenet_linear --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
