#!/bin/sh
# Run once while the image of a bento is built: adds the command `twinview` next to `bentoml`.
set -eu
cat > "$VIRTUAL_ENV/bin/twinview" <<END
#!/bin/sh
PYTHONPATH="$BENTO_PATH/src" exec python -c 'from serving.cli.main import main; main()' "\$@"
END
chmod 755 "$VIRTUAL_ENV/bin/twinview"
