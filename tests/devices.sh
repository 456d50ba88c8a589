# Sourced by scripts that have a systemd as PID 1 of namespaces of its own: its devices and run directory, below $root.
mount -t tmpfs dev "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs shm "$root/dev/shm"
touch "$root/dev/console"
mount -t tmpfs run "$root/run"
