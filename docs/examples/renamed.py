"""A family of models: Llamas whose files call everything differently."""

from dca_jax.policy import families


class Renamed:
  """`model_type: renamed`, and `transformer.layers.0...` in the place of `model.layers.0...`."""

  def read(self, given, where, dtype):
    known = given | {"model_type": "llama", "architectures": None}
    return families.from_json(known, where, dtype)

  def tensor_name(self, config, path):
    name = families.tensor_name(config, path)
    return name if "lora" in name else name.replace("model.", "transformer.", 1)
