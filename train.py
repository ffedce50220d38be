"""The main job: ``deepspeed train.py --deepspeed ds_configs/zero2.json``."""

from lvlm_clorae.training.main import main

if __name__ == "__main__":
    raise SystemExit(main())
