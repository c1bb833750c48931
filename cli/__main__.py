from brfx_cli.main import main

main()
