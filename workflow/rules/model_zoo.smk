# The page is a view of the records: making it again is cheap and changes no number.
rule model_zoo_page:
    """Collate the record of every model and benchmark of the config into the page."""
    input:
        records=page_records(),
        published="results/published.yaml",
    output:
        page="<results>/model_zoo.md",
        html=report("<results>/model_zoo.html", caption="../report/page.rst", category=section("page")),
    log:
        "<results>/model_zoo_page.log",
    benchmark:
        "<results>/model_zoo_page.tsv"
    localrule: True
    conda:
        "../../envs/simclr.yaml"
    params:
        config=CONFIG.model_dump_json(exclude_unset=True),
    shell:
        "python -m simclr model_zoo --records {input.records} --published {input.published}"
        " --config {params.config:q} --output {output.page} > {log} 2>&1"


rule model_zoo:
    """The page again, from the records that exist now: no record is an input, so nothing else runs."""
    input:
        published="results/published.yaml",
    log:
        "<results>/model_zoo.log",
    localrule: True
    conda:
        "../../envs/simclr.yaml"
    params:
        config=CONFIG.model_dump_json(exclude_unset=True),
        records=[path for path in page_records() if os.path.exists(path)],
        page=f"{CONFIG.output}/model_zoo.md",
    shell:
        "python -m simclr model_zoo --records {params.records:q} --published {input.published}"
        " --config {params.config:q} --output {params.page:q} > {log} 2>&1"


onsuccess:
    say_summary()
    make_page()


onerror:
    say_failures()
    say_summary()
    make_page()
