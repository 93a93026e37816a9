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
        detection_environment("coco2017_detection")
    threads: cores(dividing_gpus("coco2017_detection"))
    resources:
        gpu=dividing_gpus("coco2017_detection"),
        mem_mb=megabytes(3_000, per_gpu=48_000, gpus=dividing_gpus("coco2017_detection")),
        runtime=minutes(
            trained_on("coco2017_detection"), per_second=3, gpus=dividing_gpus("coco2017_detection")
        ),
    params:
        config=benchmark_block("coco2017_detection"),
        work=work_folder("coco2017_detection"),
        python=python_of_gpus,
    shell:
        "{params.python} -m simclr coco2017_detection --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record}"
        " > {log} 2>&1"
