"""What do adapters cost while decoding? Steps of whole models (`benchmarks.decode`), and whole requests
beside transformers and PEFT (`benchmarks.decode.requests`)."""
