"""How good is each method? Validation loss at the best of a sweep of learning rates, and the papers'
orderings.

    python -m benchmarks.quality --data FILE.jsonl [--data …] [--methods …] [--ranks …] --out DIR

| module | what it does |
|---|---|
| `cases` | the r x r methods by name: which basis, which initialization, which rates |
| `data` | a data set: encoded, split by the examples' hashes, in batches; one user's part of it |
| `core_runs` | one basis, all rates and seeds trained together as users of one trainer |
| `lora_runs` | the papers' LoRA forms, trained together |
| `peers` | the same data and steps through PEFT, one run after another |
| `probes` | without a sweep: how much of W matters (T5), how many examples (T7), how A recalls inputs (T15) |
| `work`, `tasks` | a list of work with a time limit, by one process or several; results are kept at once |
| `costs` | how long a list takes |
| `presets`, `full_list` | such lists by name |
| `records`, `results` | what is written, and questions to it |
| `claims`, `claims_core`, `claims_lora`, `claims_own` | T1 to T15, and two of ours, as functions of results |
| `automatic` | whether the trainer's automatic rate is near the best |
| `markdown`, `plots` | the report |
"""
