"""Tests of minilm-evaluate."""
