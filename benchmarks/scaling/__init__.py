"""How the engine scales on this machine: decode with the batch, prefill with the prompt, a token's cost with its context (`make bench-scaling`)."""
