"""The presets, one TOML file each; read by `train.config.read_preset`."""
