"""The memory account: sums by part, and what `auto` comes to."""

from llmkit.plan.account import Held, Shape, account, choose

SHAPE = Shape(params=135_000_000, layers=30, hidden=576, intermediate=1536, vocab=49152, linears=305_280)
LORA = Held(
    weight_bytes=4, activation_bytes=4, trained=16 * 305_280, moment_bytes=8, recompute=False, logit_bytes=48 << 20
)


def test_a_shape_is_read_from_a_configuration_and_headers():
    tensors = {"model.embed_tokens.weight": [100, 8], "model.layers.0.q_proj.weight": [8, 6], "model.norm.weight": [8]}
    made = Shape.read({"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 100}, tensors)
    assert (made.params, made.linears, made.intermediate) == (856, 14, 32)


def test_parts_add_up_and_recompute_trades_activations():
    plain = account(SHAPE, LORA, 512)
    assert plain.total == sum(vars(plain).values())
    again = account(SHAPE, Held(**{**vars(LORA), "recompute": True}), 512)
    assert again.activations < plain.activations / 4 and again.weights == plain.weights
    assert account(SHAPE, LORA, 1024).activations == 2 * plain.activations


def test_auto_takes_the_largest_that_fits_then_recompute_then_says_no():
    wide = choose(SHAPE, LORA, 128, 64 << 30, "cpu", None, None)
    assert wide.fits and wide.rows == 8 and not wide.recompute
    need = account(SHAPE, LORA, 128).total
    tight = choose(SHAPE, LORA, 128, int(need / 0.84), "cpu", None, None)
    assert tight.fits and tight.rows == 1 and not tight.recompute
    tighter = choose(SHAPE, LORA, 512, int(account(SHAPE, LORA, 512).total * 0.9), "cpu", None, None)
    assert tighter.fits and tighter.recompute
    assert not choose(SHAPE, LORA, 512, 1 << 20, "cpu", None, None).fits
    assert choose(SHAPE, LORA, 128, 64 << 30, "cpu", 3, True).rows == 3
