"""``deepspeed --module lvlm_clorae.training``: the same job for people who installed the wheel."""

from lvlm_clorae.training.main import entry

if __name__ == "__main__":
    entry()
