import pytest

from llmrec.errors import SettingsError
from llmrec.training.config import RecFinetuneConfig


def test_defaults(tmp_path):
    config = RecFinetuneConfig(output_dir=str(tmp_path))
    assert config.loss_scope == "trie"
    assert config.code_learning_rate_factor == 25.0
    assert config.ranking_temperature == config.code_init_scale == 1.0
    assert config.average_tokens_across_devices
    assert config.report_to == []
    assert config.prediction_loss_only
    assert not config.remove_unused_columns


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranking_temperature": 0.0}, "ranking_temperature is 0.0"),
        ({"loss_scope": "items"}, "loss_scope is 'items'; choose one of"),
        ({"code_learning_rate_factor": -1.0}, "code_learning_rate_factor is -1.0"),
        ({"code_init_scale": -0.5}, "code_init_scale is -0.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices is false"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        RecFinetuneConfig(output_dir=str(tmp_path), **settings)


def test_every_setting_of_ours_says_what_it_is():
    own = ("ranking_temperature", "loss_scope", "code_learning_rate_factor", "code_init_scale")
    for name in own:
        assert len(RecFinetuneConfig.__dataclass_fields__[name].metadata["help"]) > 30
