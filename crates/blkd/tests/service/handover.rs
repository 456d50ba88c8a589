//! The image goes from one backend to another while both have a front end: at no instant do two
//! write, whoever asks.

use serde_json::json;
use vhost::VhostBackend;

use crate::backend::{Backend, ENGINES, Site};
use crate::machine::{Ask, Machine};

fn arm(backend: &Backend, armed: bool) -> bool {
    let answer = backend.control(&json!({"id": 1, "cmd": "handover", "armed": armed}));
    assert_eq!(answer["ok"]["armed"], json!(armed), "{answer}");
    answer["ok"]["owns_image"].as_bool().unwrap()
}

fn owns(backend: &Backend) -> bool {
    backend.status()["owns_image"].as_bool().unwrap()
}

#[test]
fn the_image_is_handed_over_when_the_last_queue_stops() {
    for &engine in ENGINES {
        let site = Site::new(1 << 20);
        let source = site.start(&[engine, "--num-queues=2"]);
        let mut here = Machine::new(2, 64);
        here.connect(&site.socket()).unwrap();
        assert_eq!(here.ask(&source, &Ask::write(0, [1; 4096])).status, 0);

        // The other end: the same image behind another socket.
        let far = Site::sharing(&site.image);
        let target = far.start(&[engine, "--num-queues=2", "--incoming"]);
        let mut there = Machine::new(2, 64);
        there.negotiate(&far.socket()).unwrap();
        assert!(owns(&source) && !owns(&target));
        // Too early: refused, and the source does not notice.
        assert!(there.start(0).is_err());
        assert_eq!(here.ask(&source, &Ask::write(8, [2; 4096])).status, 0);

        assert!(arm(&source, true), "queues run");
        here.session().get_vring_base(0).unwrap();
        assert!(owns(&source), "one queue still runs");
        here.session().get_vring_base(1).unwrap();
        assert!(!owns(&source));

        there.disconnect();
        there.connect(&far.socket()).unwrap();
        assert!(owns(&target));
        assert_eq!(there.ask(&target, &Ask::read(8, 4096)).data, [2; 4096]);
        assert_eq!(there.ask(&target, &Ask::write(16, [3; 4096])).status, 0);
        // A source that believes it may go on waits, and takes nothing.
        here.start(0).unwrap();
        assert!(!owns(&source));
        let refused = source.control(&json!({"id": 2, "cmd": "handover", "armed": false}));
        assert_eq!(refused["error"]["kind"], json!("busy"), "{refused}");
        drop(target);
        assert!(!arm(&source, true), "also when nobody has the image");
        // But when it is told that the image is its own, it goes on where it waited.
        assert!(arm(&source, false));
        assert_eq!(here.ask(&source, &Ask::read(16, 4096)).data, [3; 4096]);
    }
}
