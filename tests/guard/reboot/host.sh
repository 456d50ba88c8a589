# A host with Debian's systemd, in namespaces of its own: PID 1, mounts and cgroups. The network is that of whoever
# starts it. $1 the disk with systemd, $2 a folder for mounts, $3 our units, $4 what is the same file inside and outside.
set -e
mount --make-rprivate /
disk=$2/disk root=$2/root kept=$2/kept
mkdir -p "$disk" "$root" "$kept"
mount -o loop,ro "$1" "$disk"
mount -t tmpfs kept "$kept"
mkdir "$kept/root" "$kept/root-work" "$kept/usr" "$kept/usr-work"
# What Debian's disk has not is this machine's: Python, QEMU, our programs. What is written is in memory.
mount -t overlay -o "lowerdir=$disk:/,upperdir=$kept/root,workdir=$kept/root-work" root "$root"
mount -t overlay -o "lowerdir=$disk/usr:/usr,upperdir=$kept/usr,workdir=$kept/usr-work" usr "$root/usr"
mount -t tmpfs tmp "$root/tmp"
mkdir -p "$root$4"
mount --bind "$4" "$root$4"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs cgroup "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/systemd"
mount -t cgroup -o none,name=systemd systemd "$root/sys/fs/cgroup/systemd"
. "$(dirname "$0")/../../devices.sh"
units=$root/etc/systemd/system
rm -f "$units/multi-user.target.wants"/*.service
cp -r "$3/." "$units/"
export container=lxc
exec chroot "$root" /lib/systemd/systemd --log-target=console
