# Pascal VOC12 + Aug semantic segmentation.
rule voc12aug_segmentation:
    """The record of every model that runs voc12aug_segmentation."""
    input:
        records("voc12aug_segmentation"),


rule voc12aug_segmentation_record:
    """Fine-tune FCN-R50-D8 on VOC2012 + SBD; mIoU of the val set."""
    input:
        backbone="<results>/{model}/backbone.safetensors",
        dataset="<results>/datasets/voc12aug.json",
    output:
        record=record("voc12aug_segmentation"),
        picture=picture("voc12aug_segmentation", of="predictions"),
    log:
        "<results>/{model}/logs/voc12aug_segmentation.log",
    benchmark:
        "<results>/{model}/times/voc12aug_segmentation.tsv"
    conda:
        "../../envs/mmseg.yaml"
    threads: cores(dividing_gpus("voc12aug_segmentation"))
    resources:
        gpu=dividing_gpus("voc12aug_segmentation"),
        mem_mb=megabytes(3_000, per_gpu=24_000, gpus=dividing_gpus("voc12aug_segmentation")),
        runtime=minutes(
            trained_on("voc12aug_segmentation"), per_second=10, gpus=dividing_gpus("voc12aug_segmentation")
        ),
    params:
        config=benchmark_block("voc12aug_segmentation"),
        work=work_folder("voc12aug_segmentation"),
        python=launcher,
    shell:
        "{params.python} -m simclr voc12aug_segmentation --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q}"
        " --picture {output.picture} --output {output.record} > {log} 2>&1"
