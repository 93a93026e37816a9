# ImageNet nearest-neighbour classification.
rule imagenet_knn:
    """The record of every model that runs imagenet_knn."""
    input:
        records("imagenet_knn"),


rule imagenet_knn_record:
    """Weighted vote of the nearest training images by cosine similarity of AvgPool."""
    input:
        train="<results>/{model}/features/imagenet-train",
        test="<results>/{model}/features/imagenet-val",
    output:
        record("imagenet_knn"),
    log:
        "<results>/{model}/logs/imagenet_knn.log",
    benchmark:
        "<results>/{model}/times/imagenet_knn.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(gpu)
    resources:
        gpu=gpu,
        mem_mb=megabytes(lambda wildcards: 2_000 + min(6_000, images("imagenet") // 10), gpus=gpu),
        runtime=minutes(lambda wildcards: images("imagenet", "val"), per_second=10, on=gpu),
    params:
        config=benchmark_block("imagenet_knn"),
        python=python,
    shell:
        "{params.python} -m simclr imagenet_knn --model {wildcards.model} --train {input.train} --test {input.test}"
        " --config {params.config:q} --output {output} > {log} 2>&1"
