"""What a config refuses, in one line that names the argument, and who reads whose cache."""

import pytest

from tenfold.clla import CLLAConfig, sharing_layout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_bits": 3}, "cache_bits: must be one of 4, 8, 16, got 3"),
        ({"rope_bits": 2}, "rope_bits: must be one of 4, 8, 16, got 2"),
        ({"attention": "latents"}, "attention: must be one of 'latent', 'heads', got 'latents'"),
        ({"rope_key": "pair"}, "rope_key: must be one of"),
        ({"quantizer": "later"}, "quantizer: must be one of"),
        ({"rope_dim": 7}, "rope_dim: must be even"),
        ({"latent_dim": 0}, "latent_dim: must be at least 1, got 0"),
        ({"share_factor": 0}, "share_factor: must be at least 1, got 0"),
        ({"latent_dim": "24"}, "latent_dim: must be an integer, got '24'"),
        ({"num_attention_heads": 0}, "num_attention_heads: must be at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: must be at least 1, got 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: must be at least 1, got -2"),
        ({"vocab_size": 0}, "vocab_size: must be at least 1, got 0"),
        ({"intermediate_size": -4}, "intermediate_size: must be at least 1, got -4"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: must be at least 1, got 0"),
        ({"query_dim": 0}, "query_dim: must be at least 1, got 0"),
        ({"query_dim": -1}, "query_dim: must be at least 1, got -1"),
        ({"hidden_size": 2}, "num_attention_heads: 4 do not divide hidden_size 2"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 do not divide hidden_size 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 do not divide num_attention_heads 4"),
        ({"group_size": 7}, "group_size: must be even"),
        ({"value_latent_dim": 24}, "value_latent_dim: must be between 0 and latent_dim 24, got 24"),
        ({"rope_frequencies": [1.0]}, "rope_frequencies: expected 3, one per pair, got 1"),
        (
            {
                "rope_frequencies": [1.0] * 3,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
            "rope_frequencies: do not go with rope_parameters of another rope_type than 'default', got 'linear'",
        ),
        ({"cache_code": "fp4"}, "cache_code: must be one of 'symmetric', 'asymmetric', 'float', got 'fp4'"),
        ({"rope_code": "int"}, "rope_code: must be one of 'symmetric', 'asymmetric', 'float', got 'int'"),
        ({"cache_scales": "vector"}, "cache_scales: must be one of 'token', 'channel', got 'vector'"),
        ({"cache_scales": "channel", "attention": "heads"}, "cache_scales: 'channel' does not go with attention"),
        ({"cache_scales": "channel", "cache_code": "asymmetric"}, "cache_scales: 'channel' .* cache_code 'asymmetric'"),
        ({"cache_scales": "channel", "quantizer": "before_norm"}, "cache_scales: 'channel' .* quantizer 'before_norm'"),
        ({"producers": [0, 0, 1]}, "producers: expected one per layer, 5, got 3"),
        ({"producers": [0, 0, 1, 3, 3]}, "producers: layer 2 cannot read the cache of layer 1"),
        ({"producers": [0, 2, 2, 3, 3]}, "producers: layer 1 cannot read the cache of layer 2"),
    ],
)
def test_a_config_that_makes_no_sense(sizes, settings, message):
    with pytest.raises(ValueError, match=message):
        CLLAConfig(**{**sizes, **settings})


def test_layouts():
    assert sharing_layout("adjacent", 5, 2) == [0, 0, 2, 2, 4]
    assert sharing_layout("trailing", 6, 2) == [0, 1, 2, 2, 2, 2]
    assert sharing_layout("sandwich", 6, 2) == [0, 1, 1, 1, 1, 5]
