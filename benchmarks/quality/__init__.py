"""How good is each method? Validation loss at the best of a sweep of learning rates, and the papers'
orderings.

    python -m benchmarks.quality --data FILE.jsonl [--data …] [--methods …] [--ranks …] --out DIR

| module | what it does |
|---|---|
| `cases` | the r x r methods by name: which basis, which start, which rates |
| `data` | a data set: encoded, split by the examples' hashes, in batches |
| `core_runs` | one basis, all rates and seeds trained together as users of one trainer |
| `lora_runs` | the papers' LoRA forms, trained together |
| `peers` | the same data and steps through PEFT, one run after another |
| `probes` | what needs no training: how much of W matters (T5), how well A recalls its inputs (T15) |
| `tasks` | a list of work with a time limit, by one process or several; every result is written at once |
| `presets` | such lists by name |
| `records`, `results` | what is written, and questions to it |
| `claims`, `claims_core`, `claims_lora` | the published orderings T1 to T15 as functions of the results |
| `markdown`, `plots` | the report |
"""
