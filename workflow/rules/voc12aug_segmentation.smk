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
        record("voc12aug_segmentation"),
    log:
        "<results>/{model}/logs/voc12aug_segmentation.log",
    benchmark:
        "<results>/{model}/times/voc12aug_segmentation.tsv"
    conda:
        "../../envs/mmseg.yaml"
    threads: cores
    resources:
        gpu=gpu,
        mem_mb=lambda wildcards, attempt: attempt * (3_000 + 32_000 * gpu(wildcards)),
        runtime=lambda wildcards, attempt: attempt
        * minutes(trained_on("voc12aug_segmentation"), per_second=20),
    params:
        config=benchmark_block("voc12aug_segmentation"),
        work=work_folder("voc12aug_segmentation"),
    shell:
        "python -m simclr voc12aug_segmentation --model {wildcards.model} --backbone {input.backbone}"
        " --dataset {input.dataset} --config {params.config:q} --work {params.work:q} --output {output}"
        " > {log} 2>&1"
