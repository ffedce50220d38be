"""The main job: ``deepspeed train.py --deepspeed ds_configs/zero2.json``."""

from lvlm_clorae.training.main import entry

if __name__ == "__main__":
    entry()
