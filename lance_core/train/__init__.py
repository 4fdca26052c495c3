"""Training: flow matching on latents and cross-entropy on answers, of the whole model or of a LoRA.

Imported only when used. Source: arXiv 2605.18678, section 3; train/unified_train.py and train.md of bytedance/Lance.
"""
