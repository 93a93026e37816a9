# COCO2017 object detection and instance segmentation.
rule coco2017_detection:
    """The record of every model that runs coco2017_detection."""
    input:
        records("coco2017_detection"),


rule coco2017_detection_record:
    """Fine-tune Mask R-CNN on COCO train2017; box and mask AP on val2017."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/coco2017.json",
    output:
        record=record("coco2017_detection"),
        picture=reported("coco2017_detection", "<results>/{model}/coco2017_detection.png", "detections"),
    log:
        "<results>/{model}/logs/coco2017_detection.log",
    benchmark:
        "<results>/{model}/times/coco2017_detection.tsv"
    conda:
        "../../envs/detectron2.yaml"
    threads: lambda wildcards: 8 * dividing_gpus(wildcards, "coco2017_detection") or 1
    resources:
        gpu=lambda wildcards: dividing_gpus(wildcards, "coco2017_detection"),
        mem_mb=lambda wildcards, attempt: attempt
        * (3_000 + 48_000 * dividing_gpus(wildcards, "coco2017_detection")),
        runtime=lambda wildcards, attempt: attempt
        * minutes(
            trained_on("coco2017_detection"),
            per_second=3 * max(1, dividing_gpus(wildcards, "coco2017_detection")),
        ),
    params:
        config=benchmark_block("coco2017_detection"),
        work=work_folder("coco2017_detection"),
        python=python,
    shell:
        "{params.python} -m simclr coco2017_detection --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record}"
        " > {log} 2>&1"
