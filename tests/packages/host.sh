# A fresh Debian with its systemd as PID 1, in namespaces of its own. $1 its root, $2 a cgroup that is there for it.
set -e
mount --make-rprivate /
root=$1
echo $$ >"$2/cgroup.procs"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
. "$(dirname "$0")/../devices.sh"
mount -t tmpfs tmp "$root/tmp"
export container=lxc
# Only now, so that the cgroup above is the top of what systemd sees.
exec unshare --cgroup sh -c 'mount -t cgroup2 cgroup "$0/sys/fs/cgroup" && exec chroot "$0" /lib/systemd/systemd --log-target=console' "$root"
