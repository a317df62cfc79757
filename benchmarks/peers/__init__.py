"""`make bench-peers`: our engine beside vLLM, llama.cpp and OpenVINO on this machine, interleaved, like against like."""
