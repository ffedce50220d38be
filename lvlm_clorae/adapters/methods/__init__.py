"""The built-in adapter methods: each module ``<name>`` defines ``METHOD``, an ``AdapterMethod`` of that name."""
