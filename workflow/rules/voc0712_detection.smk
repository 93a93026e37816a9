# Pascal VOC07+12 object detection.
rule voc0712_detection:
    """The record of every model that runs voc0712_detection."""
    input:
        records("voc0712_detection"),


rule voc0712_detection_record:
    """Fine-tune Faster R-CNN R50-C4 on VOC2007+2012; AP on VOC2007 test."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/voc0712.json",
    output:
        record=record("voc0712_detection"),
        picture=reported("voc0712_detection", "<results>/{model}/voc0712_detection.png", "detections"),
    log:
        "<results>/{model}/logs/voc0712_detection.log",
    benchmark:
        "<results>/{model}/times/voc0712_detection.tsv"
    conda:
        detection_environment("voc0712_detection")
    threads: cores(dividing_gpus("voc0712_detection"))
    resources:
        gpu=dividing_gpus("voc0712_detection"),
        mem_mb=megabytes(3_000, per_gpu=32_000, gpus=dividing_gpus("voc0712_detection")),
        runtime=minutes(
            trained_on("voc0712_detection"), per_second=3, gpus=dividing_gpus("voc0712_detection")
        ),
    params:
        config=benchmark_block("voc0712_detection"),
        work=work_folder("voc0712_detection"),
        python=python_of_gpus,
    shell:
        "{params.python} -m simclr voc0712_detection --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record}"
        " > {log} 2>&1"
