from bigtrain.cli import main

main()
