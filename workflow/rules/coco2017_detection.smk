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
    threads: lambda wildcards: 8 * node_gpus(wildcards) or 1
    resources:
        gpu=node_gpus,
        mem_mb=lambda wildcards, attempt: attempt * (3_000 + 48_000 * node_gpus(wildcards)),
        runtime=lambda wildcards, attempt: attempt * minutes(trained_on("coco2017_detection"), per_second=10),
    params:
        config=benchmark_block("coco2017_detection"),
        work=work_folder("coco2017_detection"),
    shell:
        "python -m simclr coco2017_detection --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record}"
        " > {log} 2>&1"
