"""`python -m latent_ae` and `accelerate launch -m latent_ae`."""

from latent_ae.cli import main

if __name__ == "__main__":
    main()
