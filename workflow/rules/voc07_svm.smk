# VOC2007 classification with linear SVMs, on each of the five feature maps.
rule voc07_svm:
    """The record of every model that runs voc07_svm."""
    input:
        records("voc07_svm"),


rule voc07_svm_record:
    """One linear SVM per class and cost on frozen features, the cost chosen by cross-validation; mAP of the test set."""
    input:
        train="<results>/{model}/features/voc2007-trainval",
        test="<results>/{model}/features/voc2007-test",
    output:
        record("voc07_svm"),
    log:
        "<results>/{model}/logs/voc07_svm.log",
    benchmark:
        "<results>/{model}/times/voc07_svm.tsv"
    conda:
        "../../envs/simclr.yaml"
    threads: cores(gpu)
    resources:
        cpus_per_task=cores(gpu),  # of Slurm: `threads` are those of this machine at most
        mem_mb=megabytes(lambda wildcards: 2_000 + images("voc2007") // 2),
        runtime=minutes(lambda wildcards: images("voc2007"), per_second=3),
    params:
        config=benchmark_block("voc07_svm"),
    shell:
        "CUDA_VISIBLE_DEVICES= python -m simclr voc07_svm --model {wildcards.model} --train {input.train} --test {input.test}"
        " --config {params.config:q} --output {output} > {log} 2>&1"
