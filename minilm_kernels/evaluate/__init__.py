"""Evaluation of encoders: relation KL, sentence features, fine-tuning, speed and size (`minilm-evaluate`).

Requires the extra `evaluate` (sentence-transformers, scikit-learn, SciPy, model2vec, matplotlib).
"""
