"""A real text encoder of a few kilobytes: CLIP's text part with random weights."""

from pathlib import Path

import torch

from taming_dist.pretrained import torchvision_models

WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "the", "of", "two"]
TOKENS, WIDTH = 6, 8


def save_text_encoder(folder: Path, seed: int = 0) -> str:
    """Save one for texts of WORDS, with up to TOKENS tokens, their last an end."""
    torchvision_models("texts")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    known = {word: k for k, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A <end>", None, [("<end>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=TOKENS, **special
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return str(folder)
