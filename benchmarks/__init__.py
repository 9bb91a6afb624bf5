"""How fast is Tessera, and compared with what? Each module answers one question, with ratios from one run.

| folder | what it measures |
|---|---|
| `attention`, `operators`, `decode`, `engine` | kernels, whole steps, and the host's work between them |
| `serving` | a running service: load, cold adapters, a noisy tenant, a soak, agreement with lm-eval |
| `processes` | memory and time to ready of `make serve`, and what a pause of a process costs |
| `quality`, `population` | what the methods of `tessera.methods` reach, compared with LoRA |
| `papers` | a table of each paper through REST, judged by lm-eval and by the loss |
| `real` | what the defaults reach on everyday tasks: against LoRA, sweeps, full fine-tuning |
| `architectures` | which models of transformers the engine serves |
| `walks`, `rooms` | the source: the files that one request crosses, and the imports between folders |
| `load`, `report`, `device_time` | what the others share: traffic, tables, records, timing on a device |
"""
