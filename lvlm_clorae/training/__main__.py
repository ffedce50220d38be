"""``deepspeed --module lvlm_clorae.training``: the same job for people who installed the wheel."""

from lvlm_clorae.training.main import main

if __name__ == "__main__":
    raise SystemExit(main())
