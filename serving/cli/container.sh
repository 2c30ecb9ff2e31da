#!/bin/sh
# Run once while the image of a bento is built: adds the command `twinview` next to `bentoml`, and a folder for the
# collections that belongs to the service's user: a new volume that is mounted there gets that owner.
set -eu
mkdir -p "$BENTO_PATH/../index"
chown --reference="$BENTO_PATH" "$BENTO_PATH/../index"
cat > "$VIRTUAL_ENV/bin/twinview" <<END
#!/bin/sh
PYTHONPATH="$BENTO_PATH/src" exec python -c 'from serving.cli.main import main; main()' "\$@"
END
chmod 755 "$VIRTUAL_ENV/bin/twinview"
