"""Which parameters the patterns of `freeze` name."""

import pytest

from bigtrain.errors import ConfigError
from bigtrain.models.freeze import frozen, parameter_names
from tests.parity.cases import model_builder

TIED = parameter_names(model_builder(tied=True)(meta=True))
APART = parameter_names(model_builder(tied=False)(meta=True))
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("names", "patterns", "found"),
    [
        (TIED, [], set()),
        (TIED, ["model.norm.weight"], {"model.norm.weight"}),
        (TIED, ["model.norm"], {"model.norm.weight"}),
        (TIED, ["lm_head"], {EMBEDDING}),
        (TIED, [EMBEDDING], {EMBEDDING}),
        (APART, ["lm_head"], {"lm_head.weight"}),
        (APART, ["*.[01].mlp.up_proj"], {f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)}),
        (APART, ["*norm*"], {name for name in APART if "norm" in name}),
        (APART, ["model.layers.1", "*.input_layernorm.weight"],
         {name for name in APART if name.startswith("model.layers.1.")} | {"model.layers.0.input_layernorm.weight"}),
    ],
)  # fmt: skip
def test_a_pattern_names_parameters_and_modules(names, patterns, found):
    assert frozen(names, patterns) == found


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["model.embed"], "key: no parameter of the model is named model.embed; did you mean `model.embed_tokens`?"),
        (["model.layers.7"], "key: no parameter of the model is named model.layers.7; did you mean `model.layers.1`?"),
        (["model.Norm"], "key: no parameter of the model is named model.Norm; did you mean `model.norm`?"),
        (["model", "lm_head"], "key: all 21 parameters are frozen, so there is nothing to train."),
        (["*"], "key: all 21 parameters are frozen, so there is nothing to train."),
    ],
)  # fmt: skip
def test_a_pattern_that_names_nothing_or_all_is_refused(patterns, told):
    with pytest.raises(ConfigError) as refused:
        frozen(APART, patterns, "key")
    assert str(refused.value) == told
