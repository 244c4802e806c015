"""A text as condition: its projection, its end, its null prefix and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import ClassCondition, SeveralConditions, TextCondition
from taming_dist.models.prior.conditions.text import TextProjection
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

FACTS = {"fingerprint": "f", "encoder": "clip", "tokens": 3, "width": 4}


def texts(count: int = 2) -> torch.Tensor:
    """Of 1, 2, 3, 1 ... vectors."""
    found = torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(0)).half()
    for number in range(count):
        found[number, 1 + number % 3 :] = 0
    return found


def test_each_vector_is_projected_alone_and_the_end_is_learned() -> None:
    torch.manual_seed(0)
    projection, given = TextProjection(4, 8), texts()
    found = projection(given)
    for text, row in zip(given.float(), found, strict=True):
        for vector, position in zip(text, row, strict=True):
            hidden = F.gelu(projection.fc1.weight @ vector, approximate="tanh")
            expected = projection.fc2.weight @ hidden if vector.any() else projection.end
            torch.testing.assert_close(position, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


def test_logits_depend_on_the_text_unless_it_is_dropped() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "width": 16, "null_prefix": True}
    condition = TextCondition(tokens=3, width=4)
    model = Transformer(TransformerConfig(12, [2, 2], condition=condition, **sizes))
    prefix = model.condition.prefix(2, {"txt": texts()})
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with_text = model(tokens, prefix)
    dropped = model(tokens, prefix.dropping(torch.tensor([True, True])))
    assert not torch.allclose(with_text[0], with_text[1])
    torch.testing.assert_close(dropped[0], dropped[1])
    assert model.config.condition_table == "own"


def test_it_goes_with_others() -> None:
    several = SeveralConditions([ClassCondition(5), TextCondition(tokens=3, width=4)])
    model = Transformer(TransformerConfig(12, [2, 2], condition=several, heads=2, width=16))
    prefix = several.prefix(2, {"cls": torch.tensor([1, 4]), "txt": texts()})
    assert model(torch.zeros(2, 4, dtype=torch.int64), prefix).shape == (2, 4, 12)


def test_sizes_and_fingerprint_are_those_of_the_codes_or_agree_with_them() -> None:
    codes: Any = SimpleNamespace(text=FACTS)
    fitted = TextCondition().fitted(codes, "x")
    assert fitted == TextCondition(tokens=3, width=4, fingerprint="f", encoder="clip")
    assert fitted.fitted(codes, "x") == fitted
    for other in ({"tokens": 2}, {"width": 5}, {"fingerprint": "g"}):
        with pytest.raises(UserError, match=r"model\.condition\.\w+ is .*, but the codes of x"):
            TextCondition(**other).fitted(codes, "x")
    codes.text = None
    with pytest.raises(UserError, match=r"x has no texts: .* --text COLUMN"):
        TextCondition().fitted(codes, "x")


def test_missing_texts_and_texts_of_another_shape_are_one_line() -> None:
    condition = TextCondition(tokens=3, width=4)
    with pytest.raises(UserError, match=r"give prompt=\.\.\. or code shards"):
        condition.prefix(2, {})
    with pytest.raises(UserError, match=r"of the shape \[2, 3, 4\], not \[2, 3, 5\]"):
        condition.prefix(2, {"txt": torch.zeros(2, 3, 5)})
    with pytest.raises(UserError, match="leave them out, they are those of the code shards"):
        TextCondition().check()
