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
    threads: lambda wildcards: 8 * node_gpus(wildcards) or 1
    resources:
        gpu=node_gpus,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * node_gpus(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(
            images("imagenet", "train") * CONFIG.benchmarks.imagenet_linear.epochs,
            per_second=1_000 * max(1, node_gpus(wildcards)),
        ),
    params:
        config=benchmark_block("imagenet_linear"),
        work=work_folder("imagenet_linear"),
        python=launcher,
    shell:
        "{params.python} -m simclr imagenet_linear --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
