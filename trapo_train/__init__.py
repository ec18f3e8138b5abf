"""A thin trainer for RL and SFT post-training on trapo_kernels; `trapo-train --help` lists what it does."""
