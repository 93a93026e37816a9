# VOC2007 low-shot classification: k = 1 … 96 positives per class.
rule voc07_lowshot:
    """The record of every model that runs voc07_lowshot."""
    input:
        records("voc07_lowshot"),


rule voc07_lowshot_record:
    """The same SVMs on k positives per class, over five independent draws; mean and spread."""
    input:
        train="<results>/{model}/features/voc2007-trainval",
        test="<results>/{model}/features/voc2007-test",
        svm=best_layer,
    output:
        record("voc07_lowshot"),
    log:
        "<results>/{model}/logs/voc07_lowshot.log",
    benchmark:
        "<results>/{model}/times/voc07_lowshot.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(gpu)
    resources:
        cpus_per_task=cores(gpu),  # of Slurm: `threads` are those of this machine at most
        mem_mb=megabytes(lambda wildcards: 2_000 + images("voc2007") // 2),
        runtime=minutes(lambda wildcards: images("voc2007"), per_second=3),
    params:
        config=benchmark_block("voc07_lowshot"),
        svm=lambda wildcards, input: f"--svm {input.svm}" if input.svm else "",
    shell:
        "CUDA_VISIBLE_DEVICES= python -m simclr voc07_lowshot --model {wildcards.model} --train {input.train} --test {input.test}"
        " {params.svm} --config {params.config:q} --output {output} > {log} 2>&1"
