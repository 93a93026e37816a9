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
        "<results>/{model}/imagenet_mhead.json",
    log:
        "<results>/{model}/logs/imagenet_mhead.log",
    benchmark:
        "<results>/{model}/times/imagenet_mhead.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: attempt * (2_000 + 24_000 * gpu(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(images("imagenet", "train") * CONFIG.benchmarks.imagenet_mhead.epochs, per_second=1_000),
    params:
        config=benchmark_block("imagenet_mhead"),
        work=work_folder("imagenet_mhead"),
    shell:
        "python -m simclr imagenet_mhead --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
