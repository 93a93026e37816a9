# Cityscapes semantic segmentation.
rule cityscapes_segmentation:
    """The record of every model that runs cityscapes_segmentation."""
    input:
        records("cityscapes_segmentation"),


rule cityscapes_segmentation_record:
    """Fine-tune FCN-R50-D8 on Cityscapes; mIoU of the val set by sliding windows."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/cityscapes.json",
    output:
        record=record("cityscapes_segmentation"),
        picture=picture("cityscapes_segmentation", of="predictions"),
    log:
        "<results>/{model}/logs/cityscapes_segmentation.log",
    benchmark:
        "<results>/{model}/times/cityscapes_segmentation.tsv"
    conda:
        "../../envs/mmseg.yaml"
    threads: cores(dividing_gpus("cityscapes_segmentation"))
    resources:
        gpu=dividing_gpus("cityscapes_segmentation"),
        mem_mb=megabytes(3_000, per_gpu=24_000, gpus=dividing_gpus("cityscapes_segmentation")),
        runtime=minutes(
            trained_on("cityscapes_segmentation"),
            per_second=10,
            gpus=dividing_gpus("cityscapes_segmentation"),
        ),
    params:
        config=benchmark_block("cityscapes_segmentation"),
        work=work_folder("cityscapes_segmentation"),
        python=launcher,
    shell:
        "{params.python} -m simclr cityscapes_segmentation --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record} > {log} 2>&1"
