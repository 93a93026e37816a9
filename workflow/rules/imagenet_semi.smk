# ImageNet semi-supervised classification.
rule imagenet_semi:
    """The record of every model that runs imagenet_semi."""
    input:
        records("imagenet_semi"),


rule imagenet_semi_record:
    """Fine-tune the whole network on 1 % and on 10 % of the labels."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/imagenet.json",
    output:
        record=record("imagenet_semi"),
        curve="<results>/{model}/imagenet_semi.csv",
        picture=picture("imagenet_semi"),
    log:
        "<results>/{model}/logs/imagenet_semi.log",
    benchmark:
        "<results>/{model}/times/imagenet_semi.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(node_gpus)
    resources:
        gpu=node_gpus,
        mem_mb=megabytes(2_000, per_gpu=24_000, gpus=node_gpus),
        runtime=minutes(trained_on("imagenet_semi"), per_second=500, gpus=node_gpus),
    params:
        config=benchmark_block("imagenet_semi"),
        work=work_folder("imagenet_semi"),
        python=launcher,
    shell:
        "{params.python} -m simclr imagenet_semi --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --curve {output.curve} --output {output.record} > {log} 2>&1"
