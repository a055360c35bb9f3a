import multiprocessing
import os
import signal
import time

from data.files import locked


def hold_with_a_child(path, connection):
    with locked(path):
        child = multiprocessing.get_context("fork").Process(target=say_and_wait, args=(connection,))
        child.start()
        time.sleep(600)


def say_and_wait(connection):
    connection.send(os.getpid())
    time.sleep(600)


def test_a_lock_ends_with_its_process_though_a_child_of_it_lives_on(tmp_path):
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("forkserver").Process(
        target=hold_with_a_child, args=(tmp_path / "lock", there)
    )
    holder.start()
    assert here.poll(60), "the child of the holder to start"
    child = here.recv()
    try:
        with locked(tmp_path / "lock", wait=False) as acquired:
            assert not acquired
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        os.kill(child, 0)  # it lives
        with locked(tmp_path / "lock", wait=False) as acquired:
            assert acquired
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_lock_excludes_within_one_process_and_ends_with_its_block(tmp_path):
    with locked(tmp_path / "lock") as outer, locked(tmp_path / "lock", wait=False) as inner:
        assert outer and not inner
    with locked(tmp_path / "lock", wait=False) as acquired:
        assert acquired
