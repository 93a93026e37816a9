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
        "<results>/{model}/imagenet_semi.json",
    log:
        "<results>/{model}/logs/imagenet_semi.log",
    benchmark:
        "<results>/{model}/times/imagenet_semi.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * gpu(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(images("imagenet", "train") * CONFIG.benchmarks.imagenet_semi.epochs, per_second=1_000),
    params:
        config=benchmark_block("imagenet_semi"),
        work=work_folder("imagenet_semi"),
    shell:
        "python -m simclr imagenet_semi --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
